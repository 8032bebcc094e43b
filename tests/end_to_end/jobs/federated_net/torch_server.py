import torch

import fedml
from fedml import FedMLRunner
from fedml.data.MNIST.data_loader import download_mnist, load_partition_data_mnist


class Flat(torch.nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, classes)

    def forward(self, x):
        return torch.sigmoid(self.layer(x))


def load(args):
    download_mnist(args.data_cache_dir)
    fedml.logging.info("the data set is %s", args.dataset)
    found = load_partition_data_mnist(
        args, args.batch_size, train_path=args.data_cache_dir + "/MNIST/train"
    )
    args.client_num_in_total = found[0]
    return list(found[1:]), found[-1]


if __name__ == "__main__":
    args = fedml.init()
    device = fedml.device.get_device(args)
    dataset, classes = load(args)
    FedMLRunner(args, device, dataset, Flat(28 * 28, classes)).run()
