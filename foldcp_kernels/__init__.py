"""Single-device ops of foldcp: torch implementations, float64 references, Triton kernels."""
