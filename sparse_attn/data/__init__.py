"""Real text from files to batches: `corpus` finds it, `prepare` writes it once, `text` reads it;
labelled images and videos: `images`.

found = corpus.resolve(path)                  # which documents, how many bytes, which sha256
folder = prepare.prepare(found, data_dir)     # a TFDS data set in array_record, split and indexed
batches = text.loader(folder, split="train", context=512, batch_size=16, seed=0)
"""
