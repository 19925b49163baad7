"""One text and one edit, as in the paper: equations over arrays, which know no batch, device, file or setting."""
