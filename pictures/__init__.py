"""Routing as one can see it: coloured text on a terminal, a heat map, a picture, a web page."""
