"""The frozen base on the device: quantized, cached, restored after a job."""
