"""gptoss-convert: verify, convert, quantize and prove OpenAI's gpt-oss checkpoints.

Importing this package loads neither numpy nor torch; the verbs import what they need when they run.
"""

__version__ = "0.1.0"
