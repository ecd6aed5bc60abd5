"""The precisions that a network can be trained in."""

import torch

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Those in which the network computes with fewer bits than it keeps."""
