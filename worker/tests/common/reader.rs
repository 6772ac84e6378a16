//! A reader of token channels, as a coordinator is one; checks what readers are promised while it reads.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use stoker_shared::frame::{Assembly, Frame, Pushed};
use stoker_shared::ports::{Bus, Notice};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use uuid::Uuid;

use super::PATIENCE;

/// Reads one channel in the background.
pub struct Reader {
    texts: watch::Receiver<HashMap<Uuid, Assembly>>,
    task: JoinHandle<()>,
}

impl Reader {
    pub async fn new(bus: Arc<dyn Bus>, channel: &str) -> Self {
        let notices = bus.subscribe(channel).await.unwrap();
        let (sender, texts) = watch::channel(HashMap::new());
        Self { texts, task: tokio::spawn(read(bus, notices, sender)) }
    }

    /// Waits until a job's text has so many tokens, or ended.
    pub async fn tokens(&mut self, key: Uuid, tokens: u32) -> Assembly {
        self.wait(key, |a| a.tokens >= tokens || a.last.is_some()).await
    }

    /// Waits for a job's end; its text and last frame.
    pub async fn end(&mut self, key: Uuid) -> (String, Frame) {
        let assembly = self.wait(key, |a| a.last.is_some()).await;
        (assembly.text, assembly.last.unwrap())
    }

    /// What it has.
    pub fn now(&self, key: Uuid) -> Assembly {
        self.texts.borrow().get(&key).cloned().unwrap_or_default()
    }

    async fn wait(&mut self, key: Uuid, is_enough: impl Fn(&Assembly) -> bool) -> Assembly {
        let enough = self.texts.wait_for(|texts| texts.get(&key).is_some_and(&is_enough));
        let texts = tokio::time::timeout(PATIENCE, enough).await;
        let texts = texts.unwrap_or_else(|_| panic!("the text of {key} goes on")).expect("the reader lives");
        texts[&key].clone()
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn read(
    bus: Arc<dyn Bus>,
    mut notices: mpsc::Receiver<Notice>,
    texts: watch::Sender<HashMap<Uuid, Assembly>>,
) {
    // Epochs as they were heard: never an older one after a newer.
    let mut heard: HashMap<Uuid, u64> = HashMap::new();
    loop {
        // No frame for a second: read the logs.
        let notice = tokio::time::timeout(Duration::from_secs(1), notices.recv()).await;
        let stale: Vec<Uuid> = match notice {
            Ok(None) => return,
            Ok(Some(Notice::Frames(frames))) => {
                let mut gaps = Vec::new();
                texts.send_modify(|texts| {
                    for frame in &frames {
                        let key = frame.job_key().expect("a frame names its job");
                        let newest = heard.entry(key).or_default();
                        assert!(frame.epoch >= *newest, "epoch {} after {newest}: {frame:?}", frame.epoch);
                        *newest = frame.epoch;
                        if push(texts.entry(key).or_default(), frame) == Pushed::Gap {
                            gaps.push(key);
                        }
                    }
                });
                gaps
            }
            Ok(Some(Notice::Interrupted)) | Err(_) => {
                let texts = texts.borrow();
                texts.iter().filter(|(_, a)| a.last.is_none()).map(|(key, _)| *key).collect()
            }
        };
        for key in stale {
            if let Ok(Some(log)) = bus.read_log(key).await {
                texts.send_modify(|texts| {
                    let assembly = texts.entry(key).or_default();
                    for frame in &log.frames {
                        push(assembly, frame);
                    }
                });
            }
        }
    }
}

/// An overlap must repeat what was said before, letter by letter.
fn push(assembly: &mut Assembly, frame: &Frame) -> Pushed {
    if let Some(had) = assembly.text.get(frame.at..) {
        let overlap = had.len().min(frame.text.len());
        assert_eq!(had[..overlap], frame.text[..overlap], "a text was changed: {frame:?}");
    }
    if let (Some(last), true) = (&assembly.last, frame.is_last()) {
        assert_eq!((last.at + last.text.len()), frame.at + frame.text.len(), "two ends differ");
    }
    assembly.push(frame)
}
