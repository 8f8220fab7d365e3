"""Fine-tuning of mixture-of-experts layers whose experts live in CPU memory.

Importing `ktk` does not import this package.
"""
