//! What `crisp run` asks of the daemon.

use std::path::Path;

use protobuf::MessageField;

use super::args::Run;
use super::flags::Protocol;
use super::image;
use crate::api::runtime::{
    self, ContainerConfig, CreateContainerRequest, KeyValue, Mount, NamespaceMode, NamespaceOption, PodSandboxConfig, PortMapping,
};
use crate::error::{Context, Error, Result};

/// Label of a sandbox that a run has made; its value is the run's token.
pub const LABEL: &str = "crisp.run/token";
/// Annotation with the log directory, which goes when the sandbox goes.
pub const LOGS_ANNOTATION: &str = "crisp.run/log-directory";
/// The container's log in that directory.
pub const LOG_FILE: &str = "container.log";

/// Sixteen random hexadecimal digits.
pub fn token() -> Result<String> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|error| Error::internal(error.to_string())).context(|| "read random bytes")?;
    Ok(format!("{:016x}", u64::from_ne_bytes(bytes)))
}

/// The sandbox of a run.
pub fn sandbox(run: &Run, token: &str, logs: &Path) -> PodSandboxConfig {
    let name = run.name.clone().unwrap_or_else(|| format!("run-{}", &token[..8]));
    let logs = logs.to_string_lossy().into_owned();
    let mut config = PodSandboxConfig::new();
    let metadata = config.metadata.mut_or_insert_default();
    metadata.name.clone_from(&name);
    metadata.namespace = "default".to_owned();
    metadata.uid = token.to_owned();
    config.hostname = if !run.host_network && is_host_name(&name) { name } else { String::new() };
    config.log_directory.clone_from(&logs);
    config.labels.insert(LABEL.to_owned(), token.to_owned());
    config.annotations.insert(LOGS_ANNOTATION.to_owned(), logs);
    config.port_mappings = run.ports.iter().map(port_mapping).collect();
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options = namespaces(run);
    config
}

/// The container of a run.
pub fn container(run: &Run, sandbox: &str, config: &PodSandboxConfig) -> CreateContainerRequest {
    let mut container = ContainerConfig::new();
    container.metadata.mut_or_insert_default().name.clone_from(&config.metadata.name);
    container.image = image::spec(&run.image);
    container.image.mut_or_insert_default().user_specified_image.clone_from(&run.image);
    // The entrypoint of the image stays, as with other tools that have a `run`.
    container.args.clone_from(&run.command);
    container.envs = run
        .environment
        .iter()
        .map(|(key, value)| KeyValue { key: key.clone(), value: value.clone().into_bytes(), ..KeyValue::default() })
        .collect();
    container.mounts = run
        .volumes
        .iter()
        .map(|volume| Mount {
            host_path: volume.host.clone(),
            container_path: volume.container.clone(),
            readonly: volume.readonly,
            ..Mount::default()
        })
        .collect();
    container.labels.clone_from(&config.labels);
    container.log_path = LOG_FILE.to_owned();
    container.linux.mut_or_insert_default().security_context.mut_or_insert_default().namespace_options = namespaces(run);
    CreateContainerRequest {
        pod_sandbox_id: sandbox.to_owned(),
        config: MessageField::some(container),
        sandbox_config: MessageField::some(config.clone()),
        ..CreateContainerRequest::default()
    }
}

/// A PID namespace for the container alone: a sandbox of one needs no living init.
fn namespaces(run: &Run) -> MessageField<NamespaceOption> {
    let network = if run.host_network { NamespaceMode::NODE } else { NamespaceMode::POD };
    MessageField::some(NamespaceOption { network: network.into(), pid: NamespaceMode::CONTAINER.into(), ..NamespaceOption::default() })
}

fn port_mapping(port: &super::flags::Port) -> PortMapping {
    let protocol = match port.protocol {
        Protocol::Tcp => runtime::Protocol::TCP,
        Protocol::Udp => runtime::Protocol::UDP,
        Protocol::Sctp => runtime::Protocol::SCTP,
    };
    PortMapping {
        protocol: protocol.into(),
        container_port: port.container.into(),
        host_port: port.host.into(),
        host_ip: port.ip.clone(),
        ..PortMapping::default()
    }
}

/// A label of RFC 1123, which a host name must be; a sandbox's name need not be one.
fn is_host_name(name: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&name.len()) && name.bytes().all(inner) && !name.starts_with('-') && !name.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::flags;

    #[test]
    fn requests_carry_the_flags() {
        let run = Run {
            image: "busybox".into(),
            command: vec!["ls".into()],
            name: Some("web".into()),
            environment: vec![("A".into(), "1".into())],
            volumes: vec![flags::volume("/a:/b:ro").unwrap()],
            ports: vec![flags::port("127.0.0.1:8080:80/udp").unwrap()],
            ..Run::default()
        };
        let config = sandbox(&run, "0123456789abcdef", Path::new("/tmp/x"));
        assert_eq!((config.metadata.name.as_str(), config.hostname.as_str(), config.log_directory.as_str()), ("web", "web", "/tmp/x"));
        let mapping = &config.port_mappings[0];
        assert_eq!(
            (mapping.protocol.value(), mapping.container_port, mapping.host_port, mapping.host_ip.as_str()),
            (1, 80, 8080, "127.0.0.1")
        );
        let request = container(&run, "s1", &config);
        let made = &request.config;
        assert_eq!((made.args.as_slice(), made.command.len()), (&["ls".to_owned()][..], 0));
        assert_eq!((made.envs[0].key.as_str(), made.envs[0].value.as_slice()), ("A", &b"1"[..]));
        assert_eq!((made.mounts[0].host_path.as_str(), made.mounts[0].readonly), ("/a", true));
        assert_eq!(made.linux.security_context.namespace_options.pid, NamespaceMode::CONTAINER.into());
    }

    #[test]
    fn host_network_keeps_the_host_name() {
        let run = Run { image: "i".into(), host_network: true, ..Run::default() };
        let config = sandbox(&run, "0123456789abcdef", Path::new("/tmp/x"));
        assert_eq!((config.metadata.name.as_str(), config.hostname.as_str()), ("run-01234567", ""));
        assert_eq!(config.linux.security_context.namespace_options.network, NamespaceMode::NODE.into());
    }

    #[test]
    fn host_names() {
        assert!(is_host_name("web-1"));
        for bad in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64)] {
            assert!(!is_host_name(bad), "{bad}");
        }
    }
}
