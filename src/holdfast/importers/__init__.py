"""Networks from elsewhere: Python code, weights, a torch.export program, an ONNX file; wrapped for images in [0, 1]."""
