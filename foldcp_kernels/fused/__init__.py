"""Fused Triton kernels behind the launchers of foldcp_kernels; importing this needs Triton."""
