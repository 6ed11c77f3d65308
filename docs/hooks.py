"""What the site takes from elsewhere when it is built: the tables of settings and flags, RESULTS.md and its figures.

A page asks for it by a comment of its own: `<!-- settings: StageOne -->`, `<!-- flags: cifarfs_5w1s -->`, `<!-- methods: all -->`,
`<!-- file: RESULTS.md -->`.
"""
import argparse
import posixpath
import re
import runpy
import sys
from pathlib import Path

from fastcore.script import anno_parser
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) # the checkout's own package

from grdd_fastai.methods.catalogue import METHODS  # noqa: E402
from grdd_fastai.runs.options import ComputeOptions, DataOptions  # noqa: E402
from grdd_fastai.settings import all_declared, flag_name  # noqa: E402
from grdd_fastai.stage_one import StageOne  # noqa: E402
from grdd_fastai.stage_two import PRESETS, StageTwo  # noqa: E402

CLASSES = dict(StageOne=StageOne, StageTwo=StageTwo, DataOptions=DataOptions, ComputeOptions=ComputeOptions)
MARK = re.compile(r'<!-- (settings|flags|methods|file): (\S+) -->')
LINK = re.compile(r'(!?)\[([^\]]*)\]\(([^)\s]+)\)')


# ---- the tables -------------------------------------------------------------------------------------------------------

def table(head, rows):
    "A Markdown table; a bar inside a cell is escaped"
    lines = [head, ['---']*len(head), *rows]
    return '\n'.join('| ' + ' | '.join(str(cell).replace('|', r'\|') for cell in line) + ' |' for line in lines)

def settings(name):
    "The table of a settings class: flag, setting, default and meaning; stage two has a column of defaults for each preset"
    presets = PRESETS if name == 'StageTwo' else dict(default=CLASSES[name]())
    def shown(v): return 'on' if v is True else 'off' if v is False else '' if v is None else f'`{v}`'
    def flags(s):
        if not s.flag: return ''
        return ', '.join(f'`{f}`' for f in (flag_name(s.flag), *([flag_name(f'no_{s.flag}')] if s.kind is bool else [])))
    rows = [[flags(s), f'`{k}`', *(shown(p.value(k)) for p in presets.values()), s.help] for k,s in all_declared(CLASSES[name]).items()]
    return table(['flag', 'setting', *(p if p == 'default' else f'preset `{p}`' for p in presets), 'meaning'], rows)

def flags(recipe):
    "The table of a recipe's own flags, without those that the settings classes declare"
    declared = {s.flag for cls in CLASSES.values() for s in all_declared(cls).values()}
    actions = anno_parser(runpy.run_path(str(ROOT/'recipes'/f'{recipe}.py'))['main'].__wrapped__)._actions
    rows = [[', '.join(f'`{o}`' for o in a.option_strings), (a.help or '') % dict(vars(a), prog=recipe)]
            for a in actions if a.dest not in declared and a.dest != 'help' and a.help != argparse.SUPPRESS]
    return table(['flag', 'meaning'], rows)

def methods(_):
    "The table of the methods of recipes/compare.py"
    def paper(m): return f'[{m.source}](https://arxiv.org/abs/{m.source})' if m.source else ''
    def others(m): return ', '.join(f'`{k}`' if k in METHODS else '`--teacher`' for k in dict.fromkeys((m.start, m.teacher)) if k)
    def classifier(m): return f'`{m.classifier}`' if m.classifier else "the method's own"
    rows = [[f'`{k}`', m.title, paper(m), others(m), classifier(m)] for k,m in METHODS.items()]
    return table(['method', 'name', 'paper', 'needs', 'classifier'], rows)

def included(name): return (ROOT/name).read_text()


# ---- mkdocs' events ---------------------------------------------------------------------------------------------------

def on_files(files, config):
    "Add the figures of RESULTS.md"
    for f in sorted((ROOT/'results'/'figures').glob('*.png')):
        name = f.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files

def on_page_markdown(markdown, page, config, files):
    "Put what is asked for in the place of the comments, and text in the place of links to files that are not on the site"
    made = dict(settings=settings, flags=flags, methods=methods, file=included)
    markdown = MARK.sub(lambda m: made[m[1]](m[2]), markdown)
    def on_site(target):
        path = target.partition('#')[0]
        here = posixpath.dirname(page.file.src_uri)
        return not path or '://' in path or files.get_file_from_path(posixpath.normpath(posixpath.join(here, path))) is not None
    return LINK.sub(lambda m: m[0] if on_site(m[3]) else m[2], markdown)
