//! The server's certificate, read again when its files change: kubelet and cert-manager replace them in place.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::ServerConfig;

use crate::config::Tls;
use crate::error::{Context, Error, Result};
use crate::sys::file;
use crate::sys::lock::{Lock, Rank};

/// Largest PEM file, bytes.
const LIMIT: u64 = 1 << 20;

/// What tells one version of the files from another: inode, modification time and size of both.
type Stamp = [(u64, i64, i64, u64); 2];

/// Certificate and key as they are on disk.
pub struct Identity {
    files: Tls,
    current: Lock<Current>,
}

struct Current {
    stamp: Stamp,
    config: Arc<ServerConfig>,
    /// Said once, not with every connection.
    complaint: Option<String>,
}

impl Identity {
    /// Reads both files; they must be good at the start.
    pub fn load(files: &Tls) -> Result<Identity> {
        let stamp = stamp(files)?;
        let config = read(files)?;
        let current = Current { stamp, config, complaint: None };
        Ok(Identity { files: files.clone(), current: Lock::new(Rank::Leaf, current) })
    }

    /// For the next connection. While new files are not good (one of the two is replaced first), the old ones stay.
    pub fn config(&self) -> Arc<ServerConfig> {
        let mut current = self.current.lock();
        let changed = stamp(&self.files).and_then(|stamp| match stamp == current.stamp {
            true => Ok(None),
            false => Ok(Some((stamp, read(&self.files)?))),
        });
        match changed {
            Ok(None) => {}
            Ok(Some((stamp, config))) => {
                log::info!("streaming: certificate {} read again", self.files.certificate.display());
                *current = Current { stamp, config, complaint: None };
            }
            Err(e) => {
                let text = e.to_string();
                if current.complaint.as_ref() != Some(&text) {
                    log::warn!("streaming: {text}; the former certificate stays");
                    current.complaint = Some(text);
                }
            }
        }
        current.config.clone()
    }
}

fn stamp(files: &Tls) -> Result<Stamp> {
    let one = |path: &Path| -> Result<(u64, i64, i64, u64)> {
        let meta = std::fs::metadata(path).context(|| format!("stat {}", path.display()))?;
        Ok((meta.ino(), meta.mtime(), meta.mtime_nsec(), meta.size()))
    };
    Ok([one(&files.certificate)?, one(&files.key)?])
}

fn read(files: &Tls) -> Result<Arc<ServerConfig>> {
    let (path, bytes) = (files.certificate.display(), file::read(&files.certificate, LIMIT)?);
    let chain = CertificateDer::pem_slice_iter(&bytes)
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|e| Error::invalid(format!("read certificate {path}: {e}")))?;
    if chain.is_empty() {
        return Err(Error::invalid(format!("read certificate {path}: no certificate in it")));
    }
    let (path, bytes) = (files.key.display(), file::read(&files.key, LIMIT)?);
    // The words of the parser do not quote the file.
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|e| Error::invalid(format!("read key {path}: {e}")))?;
    let what = |e: rustls::Error| Error::invalid(format!("use certificate {} with its key: {e}", files.certificate.display()));
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(what)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(what)?;
    // Upgrades are of HTTP/1.1.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
