"""The Triton twins of linalg's passes and of the solvers: the only place that knows about CUDA.

gramian.py, inner.py, combine.py and cone.py launch kernels; dispatch.py chooses them without Triton. Importing this
package imports none of them: Triton is loaded when the first kernel is chosen.
"""
