import numpy as np
import ward

import fedml

args = fedml.init()
assert args.role == "client"
assert args.rank > 0
model = {"w": np.zeros(3)}
fedml.FedMLRunner(args, None, ward.eight(args), model, ward.Adds(model, args)).run()
