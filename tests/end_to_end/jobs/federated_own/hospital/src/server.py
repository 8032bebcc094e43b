import numpy as np
import ward

import fedml

args = fedml.init()
assert args.role == "server"
assert args.rank == 0
model = {"w": np.full(3, 10.0)}
fedml.FedMLRunner(args, None, ward.eight(args), model, ward.Adds(model, args)).run()
