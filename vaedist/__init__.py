"""vaedist: from a folder of images to trained, evaluated and sampled variational autoencoders."""

__version__ = "0.1.0"
