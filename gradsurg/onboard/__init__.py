"""The step on a device, where nothing waits for it: operation.py and guarantee.py with tensors in place of branches.

    operation.py   rows in, p.grad out
    guarantee.py   the update's promise
    report.py      what was done, kept on the device until somebody reads it

Reached only where kernels/dispatch.py says "triton"; importing this package imports no Triton.
"""
