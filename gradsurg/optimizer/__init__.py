"""The object that a user holds, and the flow of one training step. No algebra."""
