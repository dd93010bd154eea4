"""The frozen base model on the device: quantized, cached, restored after a job."""
