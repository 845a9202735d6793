"""kohya's files, and LyCORIS': ``lora_unet_<path>.lora_down.weight``, ``.lora_up.weight``, ..."""
