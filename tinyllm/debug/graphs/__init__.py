"""Drawings of a graph of ops.

`drawing` walks the graph back from a Tensor and groups its ops by module, into the boxes and lines of `elements`;
`layout` places them, layer by layer (`layers`), and `svg` writes the picture.
"""

__all__: list[str] = []
