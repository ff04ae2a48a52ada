"""Execute plans: post a step, wait for it, and send gradients back."""
