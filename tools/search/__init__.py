"""Choosing the precision of every matrix: sensitivity, exact allocation, architecture search (DESIGN section 7)."""
