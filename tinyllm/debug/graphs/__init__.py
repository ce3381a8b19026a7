"""Drawings of a graph of ops: what to draw (`elements`), where (`layers`, `layout`), and how (`svg`)."""
