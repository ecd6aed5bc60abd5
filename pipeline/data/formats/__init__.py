"""The kinds of file that images come in, one module each; choice.py chooses by the file's name.

Each module has two functions:

    index(place, name, hashed=True) -> Iterator[Member]
        what is in the file, in a stable order, every image with a hash of its content; without
        hashes it need not read the images
    read(place, name, wheres) -> Iterator[bytes | np.ndarray]
        the content of the images at those places of the file, in that order: an encoded image
        file, or (H, W, C) uint8 pixels

Where `index` looks at files that lie beside that one, a third says at which:

    beside(name) -> list[str]

`index` with hashes reads all of a file once, `read` only what is asked for. What is wrong with a
single image is said in its Member; what is wrong with the whole file is a DataError.
"""
