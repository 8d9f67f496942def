"""What sidecars and the coordinator say to each other, and how.

`messages` are the typed words, `codec` turns them into frames and back, `transport` carries the
frames over ZeroMQ with CURVE, `keys` makes the keys and tokens that both sides need.
"""
