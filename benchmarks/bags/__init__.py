"""Multiple-instance learning on bags of real handwritten digits: attention, mean and max pooling."""
