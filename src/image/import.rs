//! Images from files: OCI layout directories, OCI archives and docker-archives (tar, plain or compressed).

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;
use serde::Deserialize;

use super::assemble::{assemble, Parts};
use super::catalog::Image;
use super::decompress::Decompress;
use super::digest::Digest;
use super::layers::Stream;
use super::manifest::{self, Descriptor, OCI_CONFIG, OCI_LAYER, OCI_MANIFEST};
use super::metadata::NAME;
use super::platform::Platform;
use super::reference::{Reference, Version};
use super::select::{select, Documents, Read, Selected};
use super::tarball::{Kind, Tarball};
use super::Inner;
use crate::error::{Code, Context, Error, Result};
use crate::sys::cancel::Cancel;
use crate::sys::rooted::{self, Rooted};

/// containerd's annotation with the full name; the standard one often has the tag alone.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
const ARCHIVE_ENTRIES: usize = 100_000;

/// Where the files of an archive are read from; several threads may read at once.
#[derive(Clone)]
enum Source {
    Dir(Arc<Rooted>),
    /// Position and length of each member.
    Tar(Arc<File>, Arc<HashMap<PathBuf, (u64, u64)>>),
}

/// A stretch of a file.
struct Part {
    file: Arc<File>,
    at: u64,
    end: u64,
}

impl std::io::Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let want = buffer.len().min(usize::try_from(self.end - self.at).unwrap_or(usize::MAX));
        let n = self.file.read_at(&mut buffer[..want], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Source {
    /// Opens a file with its size.
    fn open(&self, name: &str) -> Result<(Box<dyn std::io::Read + Send>, u64)> {
        let path = rooted::normalise(name.as_bytes())?;
        match self {
            Source::Dir(dir) => {
                let file = dir.file(&path).context(|| format!("open {name}"))?;
                let size = file.metadata().context(|| format!("open {name}"))?.len();
                Ok((Box::new(file), size))
            }
            Source::Tar(file, members) => {
                let (at, size) = *members.get(&path).ok_or_else(|| Error::precondition(format!("{name} is missing in the archive")))?;
                Ok((Box::new(Part { file: file.clone(), at, end: at + size }), size))
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        self.open(name).is_ok()
    }

    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let (reader, size) = self.open(name)?;
        if size > limit {
            return Err(Error::precondition(format!("{name}: more than {limit} bytes")));
        }
        let mut data = Vec::new();
        std::io::Read::read_to_end(&mut std::io::Read::take(reader, limit), &mut data).context(|| format!("read {name}"))?;
        Ok(data)
    }

    fn blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>> {
        let data = self.read(&blob_name(&descriptor.digest), limit)?;
        if Digest::of(&data) != descriptor.digest {
            return Err(Error::precondition(format!("blob {} does not match its digest", descriptor.digest)));
        }
        Ok(data)
    }
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Imports all images of a file or directory. `name` overrides the name of a single image.
pub(super) fn import(inner: &Arc<Inner>, path: &Path, name: Option<&str>, cancel: &Cancel) -> Result<Vec<Arc<Image>>> {
    let name = name.map(Reference::parse).transpose()?;
    if matches!(name.as_ref().map(Reference::version), Some(Version::Digest(_))) {
        return Err(Error::invalid("the name of an imported image is a tag: its digest is what it is"));
    }
    let what = || format!("import {}", path.display());
    let source = open(path, &inner.scratch, cancel).context(what)?;
    let images = if source.has("index.json") {
        import_layout(inner, &source, name.as_ref(), cancel)
    } else if source.has("manifest.json") {
        import_docker(inner, &source, name.as_ref(), cancel)
    } else {
        Err(Error::precondition("neither an OCI layout (index.json) nor a docker-archive (manifest.json)"))
    };
    images.context(what)
}

fn open(path: &Path, scratch: &Path, cancel: &Cancel) -> Result<Source> {
    let meta = std::fs::metadata(path).context(|| "open")?;
    if meta.is_dir() {
        return Ok(Source::Dir(Arc::new(Rooted::open(path)?)));
    }
    if !meta.is_file() {
        return Err(Error::invalid("neither a file nor a directory"));
    }
    let file = File::open(path).context(|| "open")?;
    let file = match Decompress::new(&file, cancel).context(|| "read")? {
        Decompress::Plain(_) => file,
        // Members are read out of order and at once: that needs a plain archive.
        _ => inflate(&file, scratch, cancel)?,
    };
    (&file).seek(SeekFrom::Start(0)).context(|| "seek")?;
    let members = index(&file)?;
    Ok(Source::Tar(Arc::new(file), Arc::new(members)))
}

/// The plain form of a compressed archive, in a file that has no name and so goes with its descriptor.
fn inflate(file: &File, scratch: &Path, cancel: &Cancel) -> Result<File> {
    use rustix::fs::{Mode, OFlags};
    let mut from = file;
    from.seek(SeekFrom::Start(0)).context(|| "seek")?;
    let plain = rustix::fs::open(scratch, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from(0o600))
        .context(|| format!("make a file in {}", scratch.display()))?;
    let mut plain = File::from(plain);
    let mut stream = Decompress::new(file, cancel).context(|| "decompress")?;
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        cancel.check()?;
        let n = std::io::Read::read(&mut stream, &mut buffer).context(|| "decompress")?;
        if n == 0 {
            return Ok(plain);
        }
        std::io::Write::write_all(&mut plain, &buffer[..n]).context(|| "write the plain archive")?;
    }
}

/// Where each member is. Links between members (docker save makes them for equal layers) are resolved once.
fn index(file: &File) -> Result<HashMap<PathBuf, (u64, u64)>> {
    let mut members = HashMap::new();
    let mut links = Vec::new();
    let mut tar = Tarball::new(BufReader::with_capacity(16 << 10, file));
    while let Some(entry) = tar.next_entry().context(|| "read archive")? {
        let path = rooted::normalise(&entry.path)?;
        match entry.kind {
            Kind::File if entry.pieces.is_none() => {
                members.insert(path, (entry.offset, entry.stored));
            }
            Kind::Symlink => {
                let above = path.parent().unwrap_or(Path::new("")).join(PathBuf::from(String::from_utf8_lossy(&entry.link).into_owned()));
                links.push((path, rooted::normalise(above.to_string_lossy().as_bytes())?));
            }
            Kind::Hardlink => links.push((path, rooted::normalise(&entry.link)?)),
            _ => {}
        }
        tar.seek_over_data().context(|| "read archive")?;
        if members.len() + links.len() > ARCHIVE_ENTRIES {
            return Err(Error::precondition(format!("more than {ARCHIVE_ENTRIES} files in the archive")));
        }
    }
    for (path, target) in links {
        if let Some(at) = members.get(&target).copied() {
            members.entry(path).or_insert(at);
        }
    }
    Ok(members)
}

#[derive(Deserialize)]
struct LayoutIndex {
    #[serde(deserialize_with = "manifest::usable")]
    manifests: Option<Vec<Descriptor>>,
}

impl Documents for (&Inner, &Source) {
    fn document(&self, descriptor: &Descriptor) -> Result<Read> {
        let data = self.1.blob(descriptor, self.0.bounds.max_manifest_bytes)?;
        Ok(Read { data, digest: descriptor.digest.clone(), media_type: descriptor.media_type.clone() })
    }

    fn config(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        self.1.blob(descriptor, self.0.bounds.max_config_bytes)
    }
}

/// Of several images those that run here; all of them when none does, as with a single one. `named`: there can be one only.
fn that_run<T>(inner: &Inner, images: Vec<T>, named: bool, config: impl Fn(&T) -> Result<ImageConfiguration>) -> Result<Vec<T>> {
    let runs = images.iter().map(|image| Ok(inner.platform.runs(&config(image)?))).collect::<Result<Vec<bool>>>()?;
    let some = runs.contains(&true);
    let images: Vec<T> = images.into_iter().zip(runs).filter(|(_, runs)| *runs || !some).map(|(image, _)| image).collect();
    match named && images.len() > 1 {
        true => Err(Error::invalid("a name was given, but the archive has several images")),
        false => Ok(images),
    }
}

fn import_layout(inner: &Arc<Inner>, source: &Source, name: Option<&Reference>, cancel: &Cancel) -> Result<Vec<Arc<Image>>> {
    let data = source.read("index.json", inner.bounds.max_manifest_bytes)?;
    let index: LayoutIndex = serde_json::from_slice(&data).context(|| "parse index.json")?;
    let tops = for_this_host(index.manifests.as_deref().unwrap_or_default(), &inner.platform)?;
    let from = (&**inner, source);
    let (mut found, mut left_out) = (Vec::new(), None);
    for top in tops {
        let read = from.document(top)?;
        let is_artifact = manifest::is_artifact(&read.data);
        match select(&from, read, &inner.platform) {
            Ok(selected) => found.push((top, from.config(&selected.manifest.config)?, selected)),
            // Signatures and the like stand beside images, and images for other hosts.
            Err(e) if is_artifact || e.code() == Code::NotFound => {
                log::info!("image: import: {} is left out: {e}", top.digest);
                left_out.get_or_insert(e);
            }
            Err(e) => return Err(e),
        }
    }
    let found =
        that_run(inner, found, name.is_some(), |(_, data, selected)| Ok(manifest::parse_config(data, selected.manifest.layers.len())?.0))?;
    let mut images = Vec::new();
    for (top, config_data, Selected { read, manifest }) in found {
        let names = match name {
            Some(name) => vec![name.clone()],
            None => annotated_name(top).into_iter().collect(),
        };
        let digest_names = names.iter().map(|n| n.with_digest(&top.digest).to_string());
        let media_type = manifest::media_type(&read.data, &read.media_type);
        let parts = Parts {
            names: names.iter().map(|n| n.to_string()).chain(digest_names).collect(),
            manifest: Descriptor::new(&media_type, read.digest, read.data.len() as u64),
            manifest_data: read.data,
            config_data,
            layers: manifest.layers,
            layers_have_digests: true,
        };
        let from = source.clone();
        let open = move |layer: &Descriptor| from.open(&blob_name(&layer.digest)).map(|(reader, _)| Stream::new(reader));
        images.push(assemble(inner, parts, Arc::new(open), &cancel.part(), None)?);
    }
    match left_out {
        Some(e) if images.is_empty() => Err(e),
        _ => Ok(images),
    }
}

/// The images of a layout, of those that stand there once per platform the best one. What is for other platforms alone is
/// left out, unless there is nothing else.
fn for_this_host<'a>(entries: &'a [Descriptor], platform: &Platform) -> Result<Vec<&'a Descriptor>> {
    let mut chosen: Vec<&Descriptor> = Vec::new();
    let mut none = None;
    for entry in entries {
        let Some(for_platform) = &entry.platform else {
            chosen.push(entry);
            continue;
        };
        let name = annotated_name(entry).map(|n| n.to_string());
        let same = |other: &&Descriptor| other.platform.is_some() && annotated_name(other).map(|n| n.to_string()) == name;
        let rivals: Vec<Descriptor> = entries.iter().filter(same).cloned().collect();
        match manifest::candidates(&rivals, platform) {
            Ok(best) if best[0] == entry && !chosen.contains(&entry) => chosen.push(entry),
            Ok(_) => {}
            Err(e) => {
                log::debug!("image: import: {} of {} is not for this host", entry.digest, for_platform);
                none.get_or_insert(e);
            }
        }
    }
    match none {
        Some(e) if chosen.is_empty() => Err(e),
        _ => Ok(chosen),
    }
}

/// The name in a descriptor's annotations. A bare tag (`latest`), as some tools write it, is no name.
fn annotated_name(descriptor: &Descriptor) -> Option<Reference> {
    [CONTAINERD_NAME, NAME].into_iter().filter_map(|key| descriptor.annotations.get(key)).find_map(|text| {
        let full = text.contains(['/', ':']);
        Reference::parse(text).ok().filter(|r| full && matches!(r.version(), Version::Tag(_)))
    })
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

fn import_docker(inner: &Arc<Inner>, source: &Source, name: Option<&Reference>, cancel: &Cancel) -> Result<Vec<Arc<Image>>> {
    let data = source.read("manifest.json", inner.bounds.max_manifest_bytes)?;
    let list: Vec<DockerImage> = serde_json::from_slice(&data).context(|| "parse manifest.json")?;
    let found = list.into_iter().map(|image| {
        let config_data = source.read(&image.config, inner.bounds.max_config_bytes)?;
        let (parsed, diff_ids) = manifest::parse_config(&config_data, image.layers.len())?;
        Ok((image, config_data, parsed, diff_ids))
    });
    let found = that_run(inner, found.collect::<Result<Vec<_>>>()?, name.is_some(), |(_, _, parsed, _)| Ok(parsed.clone()))?;
    let mut images = Vec::new();
    for (image, config_data, _, diff_ids) in found {
        let names = match name {
            Some(name) => vec![name.to_string()],
            None => image
                .repo_tags
                .unwrap_or_default()
                .iter()
                .map(|t| Reference::parse(t).map(|r| r.to_string()))
                .collect::<Result<_>>()
                .context(|| "parse manifest.json")?,
        };
        let config = Descriptor::new(OCI_CONFIG, Digest::of(&config_data), config_data.len() as u64);
        // The archive names files, not digests: a layer is known by its diff ID, which is checked in any case.
        let mut files = HashMap::new();
        let mut layers = Vec::new();
        for (file, diff_id) in image.layers.iter().zip(diff_ids) {
            let (_, size) = source.open(file)?;
            layers.push(Descriptor::new(OCI_LAYER, diff_id.clone(), size));
            files.insert(diff_id, file.clone());
        }
        let manifest_data = manifest::compose(&config, &layers)?;
        let parts = Parts {
            manifest: Descriptor::new(OCI_MANIFEST, Digest::of(&manifest_data), manifest_data.len() as u64),
            manifest_data,
            config_data,
            layers,
            layers_have_digests: false,
            names,
        };
        let from = source.clone();
        let open = move |layer: &Descriptor| {
            let file = files.get(&layer.digest).ok_or_else(|| Error::internal("layer without a file"))?;
            from.open(file).map(|(reader, _)| Stream::new(reader))
        };
        images.push(assemble(inner, parts, Arc::new(open), &cancel.part(), None)?);
    }
    Ok(images)
}
