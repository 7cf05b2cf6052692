"""Kernels in portable Triton. Imported only where they run: CPU installs of torch have no triton."""
