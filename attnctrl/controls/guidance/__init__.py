"""Methods that change the guidance: away from a worse prediction, or by another scale in each part of the picture."""
