import os
from pathlib import Path
import json
from .corpus import Video, Split
def load(datatype,data_path,features_path,train_csv=None,val_csv=None,want=()):
    d=json.loads(Path(data_path).read_text()); out={}
    for w in want:
        sp={'train':'train','val':'test'}[w]
        vids=[v['video_id'] for v in d['videos'] if v['split']==sp]
        videos=tuple(Video(v,f'{features_path}/{v}.mp4') for v in vids if os.path.exists(f'{features_path}/{v}.mp4'))
        idx={v.id:i for i,v in enumerate(videos)}
        caps=tuple(sorted((idx[s['video_id']],s['caption']) for s in d['sentences'] if s['video_id'] in idx))
        out[w]=Split(w,videos,caps,tuple(f'{features_path}/{v}.mp4' for v in vids if v not in idx))
    return out
