"""Keys of `data`, of the parts of `mixture`, and of the datasets of `evals`."""

from big_vit.config.fields import Field, check_text, choice, classes, integer
from big_vit.config.registries import SOURCES

# None as a default means "not set": the value is required, inherited or absent.
DATASET = {
    'name': Field(SOURCES.name, None, 'Source of the examples; see docs/data.md.'),
    'split': Field(check_text, 'train', "Splits in TFDS syntax, as in 'train[:90%]+extra'."),
    'path': Field(
        check_text, None, 'Folder or files, local, gs:// or s3://; the data_dir for tfds.'
    ),
    'index': Field(
        check_text, None, 'Folder of the indices of shards, if they are not beside them.'
    ),
    'annotations': Field(
        check_text, None, 'JSON file of COCO, or several: a pattern with a * for the split.'
    ),
    'corners': Field(
        choice('inclusive', 'exclusive'),
        None,
        "Corners of VOC's boxes: pixels from 1 of which the last is inside, or ends from 0.",
    ),
    'zero_label': Field(
        choice('class', 'ignored'), None, 'Whether 0 is a class of pixels, or none, as in ADE20K.'
    ),
    'boxes_column': Field(check_text, None, 'Column of the objects in pictures.'),
    'box_format': Field(
        choice('xywh', 'xyxy'),
        None,
        'Boxes of `boxes_column`: with sides as in COCO, or corners.',
    ),
    'tfds_name': Field(check_text, None, "Name of the TFDS dataset, such as 'cifar10'."),
    'image_column': Field(check_text, None, 'Column of images.'),
    'label_column': Field(
        check_text,
        None,
        'Column of labels.',
    ),
    'text_column': Field(
        check_text,
        None,
        "Extension of the members with the text of each image, such as 'txt'.",
    ),
    'num_classes': Field(integer(1, 2**24), None, "Classes; by default the source's own count."),
    'num_examples': Field(
        integer(1, 2**40),
        None,
        'Examples the split must have; with num_classes, `plan` needs no data.',
    ),
    'label_map': Field(check_text, None, 'JSON file {"class": number}; null leaves out a class.'),
    'classes': Field(
        classes, None, 'Only examples of these classes, which become 0, 1, ...; a tuple.'
    ),
    'transform': Field(
        check_text,
        'resize(size)',
        "Operations such as 'resize(size) | flip_lr'; docs/data.md has them.",
    ),
    'cache': Field(
        choice('auto', 'none', 'decoded', 'resized'),
        'auto',
        'Keep decoded images in memory (auto: if they take at most 1 GiB), or smaller ones on '
        'disk.',
    ),
    'cache_side': Field(integer(8, 16384), 256, "Shorter side of the images of cache='resized'."),
    'on_error': Field(
        choice('stop', 'skip'),
        'stop',
        'At a damaged example end the run, or take the next one and count.',
    ),
}
