"""Flower's gRPC stream: the messages, the server's end and the device's end."""
