"""Write the merges of model=tiny's tokenizers: byte pairs joined until every word below is one token.

python experiments/tiny_model/make_vocabulary.py nai_xl/assets/tiny_merges.txt
"""

import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from nai_xl.data.source.photographs import RECIPE

COMMON = """
a an the of in on at with and or from by to under over above below behind beside between near next inside outside into
through around across is are was no not its his her their this that one two three four five six seven eight nine ten
black white red green blue yellow orange purple pink brown grey gray golden gold silver cyan magenta violet beige tan
teal dark light bright pale deep plain solid colour color colorful completely image picture photo photograph painting
drawing sketch close up view portrait landscape square round long short tall small tiny large big huge wide narrow
thin thick old new young many few several hundreds empty full half left right top bottom center middle corner edge
side front back man woman girl boy child person people face head eye eyes hair hand hands arm leg mouth nose smile
smiling standing sitting walking running looking holding wearing coat dress shirt suit hat helmet shoe glasses cat dog
horse bird fish animal cow sheep tree trees grass flower flowers leaf leaves forest field mountain hill river lake sea
ocean beach sand snow rain cloud clouds sky sun moon star stars galaxy night day dusk dawn evening morning house
building tower towers city street road bridge car bicycle motorcycle train boat ship plane rocket shuttle wheel cup
plate bowl glass spoon fork knife table chair desk lamp lamps clock book window door wall floor brick bricks wood
wooden stone stones metal steel glass paper cloth water fire smoke ice food fruit apple bread coffee tea espresso milk
circle triangle rectangle disc line lines stripe stripes dot dots pattern texture background shadow silhouette anime
solo looking viewer masterpiece best quality score artist character copyright general
""".split()


def main() -> None:
    words = [word for item in RECIPE for word in item.caption.replace(",", " ").replace("'", " ").split()]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(sorted({*words, *COMMON}), trainer)
    folder = Path(sys.argv[1]).parent
    vocabulary, merges = tokenizer.model.save(str(folder))
    lines = Path(merges).read_text(encoding="utf-8").splitlines()[1:]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path(vocabulary).unlink()
    Path(merges).unlink()


if __name__ == "__main__":
    main()
