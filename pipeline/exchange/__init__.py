"""Models in the formats of other programs: diffusers folders, ONNX, torch.export."""
