//! What is known about images on disk: an OCI image layout (root/images: `oci-layout`, `index.json`, blobs of manifests
//! and configs). One entry of the index per name of an image; an image that lost all its names has one without.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::manifest::{Descriptor, OCI_INDEX};
use crate::error::{Context, Error, Result};
use crate::sys::file::{self, Durability};

/// The annotation that carries an entry's name: `repository:tag` or `repository@digest`.
pub const NAME: &str = "org.opencontainers.image.ref.name";
const INDEX_LIMIT: u64 = 64 << 20;

/// One entry of the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub name: Option<String>,
    /// The image manifest (never an index).
    pub manifest: Descriptor,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u32,
    media_type: String,
    manifests: Vec<serde_json::Value>,
}

/// The layout's directory.
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Opens the layout, makes a missing one.
    pub fn open(dir: &Path) -> Result<Layout> {
        file::make_dir(dir, 0o700)?;
        file::make_dir(&dir.join("blobs"), 0o700)?;
        file::make_dir(&dir.join("blobs/sha256"), 0o700)?;
        let marker = dir.join("oci-layout");
        if !marker.exists() {
            file::write(&marker, b"{\"imageLayoutVersion\":\"1.0.0\"}", 0o600, Durability::Synced)?;
        }
        Ok(Layout { dir: dir.to_owned() })
    }

    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// Stores a small blob under its digest.
    pub fn write_blob(&self, digest: &Digest, data: &[u8]) -> Result<()> {
        if self.read_blob(digest, data.len() as u64).is_ok() {
            return Ok(());
        }
        file::write(&self.blob_path(digest), data, 0o600, Durability::Synced)
    }

    /// Reads a small blob and checks its digest.
    pub fn read_blob(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let data = file::read(&self.blob_path(digest), limit)?;
        if Digest::of(&data) != *digest {
            return Err(Error::internal(format!("blob {digest}: content does not match")));
        }
        Ok(data)
    }

    /// Removes all blobs but `keep`.
    pub fn keep_blobs(&self, keep: &HashSet<Digest>) -> Result<()> {
        let dir = self.dir.join("blobs/sha256");
        let what = || format!("list {}", dir.display());
        for entry in std::fs::read_dir(&dir).context(what)? {
            let name = entry.context(what)?.file_name().to_string_lossy().into_owned();
            if !keep.iter().any(|d| d.hex() == name) {
                file::remove_file(&dir.join(name))?;
            }
        }
        Ok(())
    }

    /// The index's entries. An unreadable entry is logged and left out; an unreadable index is moved to `quarantine` and
    /// reported as None.
    pub fn load(&self, quarantine: &Path) -> Result<Option<Vec<Record>>> {
        let path = self.dir.join("index.json");
        if !path.exists() {
            return Ok(Some(Vec::new()));
        }
        let index = file::read(&path, INDEX_LIMIT)
            .and_then(|data| serde_json::from_slice::<Index>(&data).context(|| format!("parse {}", path.display())));
        let index = match index {
            Ok(index) => index,
            Err(e) => {
                let to = quarantine_file(&path, quarantine)?;
                log::error!("image: {e}; moved to {}, images must be pulled again (finished layers are kept)", to.display());
                return Ok(None);
            }
        };
        let mut records = Vec::new();
        for entry in index.manifests {
            match serde_json::from_value::<Descriptor>(entry) {
                Ok(mut manifest) => records.push(Record { name: manifest.annotations.remove(NAME), manifest }),
                Err(e) => log::error!("image: entry of {}: {e}; left out", path.display()),
            }
        }
        Ok(Some(records))
    }

    /// What is wrong with the index file, which should hold these entries.
    pub fn differs(&self, records: &[Record]) -> Option<String> {
        let path = self.dir.join("index.json");
        if records.is_empty() && !path.exists() {
            return None;
        }
        let index = file::read(&path, INDEX_LIMIT)
            .and_then(|data| serde_json::from_slice::<Index>(&data).context(|| format!("parse {}", path.display())));
        match (index, to_index(records)) {
            (Ok(found), Ok(want)) if found.manifests == want.manifests => None,
            (Ok(_), _) => Some("it does not name the images that are known".to_owned()),
            (Err(e), _) => Some(e.to_string()),
        }
    }

    pub fn index_path(&self) -> PathBuf {
        self.dir.join("index.json")
    }

    /// Digests of all blobs there are, by the files' names.
    pub fn blobs(&self) -> Result<Vec<Digest>> {
        let dir = self.dir.join("blobs/sha256");
        let what = || format!("list {}", dir.display());
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&dir).context(what)? {
            let name = entry.context(what)?.file_name().to_string_lossy().into_owned();
            found.extend(Digest::parse(&format!("sha256:{name}")).ok());
        }
        found.sort();
        Ok(found)
    }

    /// Replaces the index.
    pub fn save(&self, records: &[Record]) -> Result<()> {
        let data = serde_json::to_vec(&to_index(records)?).context(|| "write image index")?;
        file::write(&self.dir.join("index.json"), &data, 0o600, Durability::Synced)
    }
}

fn to_index(records: &[Record]) -> Result<Index> {
    let entry = |record: &Record| {
        let mut manifest = record.manifest.clone();
        if let Some(name) = &record.name {
            manifest.annotations.insert(NAME.to_owned(), name.clone());
        }
        serde_json::to_value(manifest).context(|| "write image index")
    };
    let manifests = records.iter().map(entry).collect::<Result<_>>()?;
    Ok(Index { schema_version: 2, media_type: OCI_INDEX.to_owned(), manifests })
}

/// Moves a file to the quarantine directory under a name that is free.
pub fn quarantine_file(path: &Path, quarantine: &Path) -> Result<PathBuf> {
    file::make_dir(quarantine, 0o700)?;
    let stamp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
    let to = quarantine.join(format!("{}-{stamp}", path.file_name().unwrap_or_default().to_string_lossy()));
    std::fs::rename(path, &to).context(|| format!("move {} to {}", path.display(), to.display()))?;
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::OCI_MANIFEST;

    #[test]
    fn records_survive() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let manifest = Descriptor::new(OCI_MANIFEST, Digest::of(b"m"), 1);
        let records = [Record { name: Some("a/b:c".into()), manifest: manifest.clone() }, Record { name: None, manifest }];
        layout.save(&records).unwrap();
        assert_eq!(layout.load(&dir.path().join("q")).unwrap().unwrap(), records);
        std::fs::write(dir.path().join("index.json"), "{torn").unwrap();
        assert!(layout.load(&dir.path().join("q")).unwrap().is_none());
        assert_eq!(std::fs::read_dir(dir.path().join("q")).unwrap().count(), 1);
        assert!(layout.load(&dir.path().join("q")).unwrap().unwrap().is_empty());
    }

    #[test]
    fn blobs_are_checked() {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::open(dir.path()).unwrap();
        let digest = Digest::of(b"data");
        layout.write_blob(&digest, b"data").unwrap();
        assert_eq!(layout.read_blob(&digest, 10).unwrap(), b"data");
        std::fs::write(layout.blob_path(&digest), b"evil").unwrap();
        assert!(layout.read_blob(&digest, 10).is_err());
        layout.keep_blobs(&HashSet::new()).unwrap();
        assert!(!layout.blob_path(&digest).exists());
    }
}
