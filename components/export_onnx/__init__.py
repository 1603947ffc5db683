"""Export a bundle as ONNX and check its parity."""
