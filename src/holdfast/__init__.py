"""holdfast: swap your loss, train, and get a robustness number you can defend."""

__version__ = "0.1.0"
