"""VILA-U: a Llama that reads and writes images as residual-quantized SigLIP features."""
