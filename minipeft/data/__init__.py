"""Datasets found and split; batches of similar length."""
