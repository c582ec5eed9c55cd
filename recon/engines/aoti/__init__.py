"""What `engine=inductor` is made of.

compile: torch module and recipe to a package. record: which products the lowered graph holds. package: what lies in a
package beside the code, and what is checked before that code is loaded. inspection: kernels and formats by module.
form: packages of recon's own kernels, which hold weights and no code. session: a loaded package, on CUDA replayed as a
CUDA graph.
"""
