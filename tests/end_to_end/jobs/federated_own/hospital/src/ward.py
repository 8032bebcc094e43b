"""A mean of numbers, learned by adding; what both scripts have in common."""

import argparse
import os
import sys

from fedml.core import ClientTrainer


class Adds(ClientTrainer):
    def get_model_params(self):
        return self.model

    def set_model_params(self, model_parameters):
        self.model = model_parameters

    def train(self, train_data, device, args):
        parser = argparse.ArgumentParser()
        parser.add_argument("--step", type=float)
        step = parser.parse_known_args()[0].step
        shift = float(os.environ["FEDML_ENV_TRAINING_PARAMS_SHIFT"])
        hospital = os.environ["HOSPITAL"]
        sys.stdout.write(f"rank {args.rank} of {hospital}: step {step}, shift {shift}\n")
        self.model = {"w": self.model["w"] + step * self.id + shift}

    def test(self, test_data, device, args):
        return {"w": float(self.model["w"][0])}


def eight(args):
    known = dict.fromkeys(range(args.client_num_in_total), args.patients)
    loaders = {client: [client] for client in known}
    return [sum(known.values()), 0, [], None, known, loaders, loaders, 2]
