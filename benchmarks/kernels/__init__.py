"""The kernels against torch's own, torch.compile, the vendor's libraries and Liger-Kernel, on a GPU."""
