"""What is the same for every model and algorithm: the stream, security, runs, reports, boards.

Nothing here imports server.py, client.py or utils.py, and importing it has no effect.
"""
