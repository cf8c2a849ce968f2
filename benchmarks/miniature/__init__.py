"""The miniature: a small Stable-Diffusion-shaped model of a drawn world whose true regions are known."""
