"""The maths, on tensors alone: this folder imports nothing of the package above it.

Shape legend, used in all files here:

    T  tokens                       E  experts                k  experts per token
    S  routed rows, T * k           H  hidden (model) size    I  inner size of an expert
    R  rank of the adapter          K, N  in and out features of one projection
"""
