"""Demos: a frozen probe, LoRA and full fine-tuning compared on real data, as ``gift demo`` runs them.

``digits`` needs scikit-learn, ``image`` a small pre-trained network too (the extras ``demo`` and ``image`` of this distribution bring them).
"""
