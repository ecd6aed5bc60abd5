"""InceptionV3 in the form that the FID is defined on.

The network of Szegedy et al. 2016 (arXiv:1512.00567) as TensorFlow published it on 2015-12-05, with
1,008 classes. Three things tell it from the ImageNet network of today: averages leave out the
padding, the last block takes a maximum where the others take an average, and there is no auxiliary
classifier. Parameters have the names of torchvision, in which pytorch-fid and torch-fidelity
publish these weights.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 299
NUM_CLASSES = 1008

Size = int | tuple[int, int]


class Conv(nn.Module):
    """A convolution, its normalisation over the batch, and a ReLU."""

    def __init__(self, ins: int, outs: int, size: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def wide(ins: int, outs: int) -> Conv:
    """1×7"""
    return Conv(ins, outs, (1, 7), padding=(0, 3))


def tall(ins: int, outs: int) -> Conv:
    """7×1"""
    return Conv(ins, outs, (7, 1), padding=(3, 0))


def average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """At 35×35."""

    def __init__(self, ins: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(ins, 64, 1)
        self.branch5x5_1 = Conv(ins, 48, 1)
        self.branch5x5_2 = Conv(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Conv(ins, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, padding=1)
        self.branch_pool = Conv(ins, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        once = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class BlockB(nn.Module):
    """35×35 to 17×17."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.branch3x3 = Conv(ins, 384, 3, stride=2)
        self.branch3x3dbl_1 = Conv(ins, 64, 1)
        self.branch3x3dbl_2 = Conv(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        twice = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), twice, F.max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """At 17×17."""

    def __init__(self, ins: int, mid: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(ins, 192, 1)
        self.branch7x7_1 = Conv(ins, mid, 1)
        self.branch7x7_2 = wide(mid, mid)
        self.branch7x7_3 = tall(mid, 192)
        self.branch7x7dbl_1 = Conv(ins, mid, 1)
        self.branch7x7dbl_2 = tall(mid, mid)
        self.branch7x7dbl_3 = wide(mid, mid)
        self.branch7x7dbl_4 = tall(mid, mid)
        self.branch7x7dbl_5 = wide(mid, 192)
        self.branch_pool = Conv(ins, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17×17 to 8×8."""

    def __init__(self, ins: int) -> None:
        super().__init__()
        self.branch3x3_1 = Conv(ins, 192, 1)
        self.branch3x3_2 = Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Conv(ins, 192, 1)
        self.branch7x7x3_2 = wide(192, 192)
        self.branch7x7x3_3 = tall(192, 192)
        self.branch7x7x3_4 = Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([small, self.branch7x7x3_4(large), F.max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """At 8×8."""

    def __init__(self, ins: int, largest: bool) -> None:
        super().__init__()
        self.largest = largest
        self.branch1x1 = Conv(ins, 320, 1)
        self.branch3x3_1 = Conv(ins, 384, 1)
        self.branch3x3_2a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Conv(ins, 448, 1)
        self.branch3x3dbl_2 = Conv(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Conv(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Conv(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Conv(ins, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch3x3_1(x)
        twice = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.largest else average(x)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(once),
            self.branch3x3_2b(once),
            self.branch3x3dbl_3a(twice),
            self.branch3x3dbl_3b(twice),
            self.branch_pool(pooled),
        ]
        return torch.cat(branches, 1)


class Inception(nn.Module):
    """(B, 3, 299, 299) in [-1, 1] to features (B, 2048) and log-probabilities (B, 1008)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, largest=False)
        self.Mixed_7c = BlockE(2048, largest=True)
        self.fc = nn.Linear(2048, NUM_CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        h = F.max_pool2d(h, 3, stride=2)
        h = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h)), 3, stride=2)
        h = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(h)))
        h = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(h)))
        h = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(h)))
        features = self.Mixed_7c(self.Mixed_7b(h)).mean((2, 3))
        # the inception score was defined without the bias (Salimans et al. 2016, their code)
        return features, (features @ self.fc.weight.T).log_softmax(1)
