"""The one exception of attnctrl."""


class ControlError(ValueError):
    """Something in a control, a region or a prompt cannot work; the sentence says what, where and what to do."""
