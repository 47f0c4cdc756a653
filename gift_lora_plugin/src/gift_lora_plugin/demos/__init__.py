"""Demos: a frozen probe, LoRA and full fine-tuning compared on real data, as ``gift demo`` runs them.

``digits`` needs scikit-learn; ``image`` needs a small pre-trained network too. The extras ``demo`` and ``image`` bring them.
"""
