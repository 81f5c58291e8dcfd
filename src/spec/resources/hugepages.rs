//! Limits of huge pages, by size.

use oci_spec::runtime::LinuxHugepageLimit;

use super::super::HostFacts;
use crate::api::runtime::LinuxContainerResources;
use crate::error::{Error, Result};

/// kubelet sends a limit for each size, mostly 0. A limit of 0 that cannot be set is left out: on a host without that size
/// there is nothing to limit, and without the controller containers always could take what is free.
pub(super) fn limits(asked: &LinuxContainerResources, host: &HostFacts) -> Result<Vec<LinuxHugepageLimit>> {
    let mut limits: Vec<LinuxHugepageLimit> = Vec::new();
    for wanted in &asked.hugepage_limits {
        let size = &wanted.page_size;
        if limits.iter().any(|limit| limit.page_size() == size) {
            return Err(Error::invalid(format!("hugepage_limits: {size}: given twice")));
        }
        let known = host.hugepage_sizes.contains(size);
        if !known || !host.hugetlb_controller {
            if wanted.limit == 0 {
                continue;
            }
            let why = if known { "there is no hugetlb cgroup controller" } else { "the host has no pages of this size" };
            return Err(Error::precondition(format!("hugepage_limits: {size}: {why}")));
        }
        let bytes = i64::try_from(wanted.limit).map_err(|_| Error::invalid(format!("hugepage_limits: {size}: limit too large")))?;
        let mut limit = LinuxHugepageLimit::default();
        limit.set_page_size(size.clone()).set_limit(bytes);
        limits.push(limit);
    }
    Ok(limits)
}

/// `changed` over `present`, by size.
pub(super) fn merge(present: &[LinuxHugepageLimit], changed: Vec<LinuxHugepageLimit>) -> Option<Vec<LinuxHugepageLimit>> {
    let kept = present.iter().filter(|old| !changed.iter().any(|new| new.page_size() == old.page_size())).cloned();
    let all: Vec<_> = kept.collect::<Vec<_>>().into_iter().chain(changed).collect();
    Some(all).filter(|all| !all.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::super::fixture::Fixture;
    use super::super::tests::{page_limit, resources_of};
    use crate::error::Code;

    #[test]
    fn limits_of_the_hosts_sizes() {
        let mut fixture = Fixture::new();
        fixture.resources().hugepage_limits = vec![page_limit("2MB", 1 << 21), page_limit("1GB", 0), page_limit("64KB", 0)];
        let limits = resources_of(&mut fixture).hugepage_limits().clone().unwrap();
        assert_eq!(limits.iter().map(|l| (l.page_size().as_str(), l.limit())).collect::<Vec<_>>(), [("2MB", 1 << 21), ("1GB", 0)]);

        fixture.host.hugetlb_controller = false;
        let error = fixture.error();
        assert!(error.code() == Code::FailedPrecondition && error.message().contains("2MB"), "{error}");
        fixture.resources().hugepage_limits = vec![page_limit("2MB", 0)];
        assert!(resources_of(&mut fixture).hugepage_limits().is_none());
        fixture.resources().hugepage_limits = vec![page_limit("64KB", 1)];
        assert!(fixture.error().message().contains("64KB"));
    }

    #[test]
    fn contradictions_and_numbers_too_large() {
        let mut fixture = Fixture::new();
        fixture.resources().hugepage_limits = vec![page_limit("2MB", 1 << 21), page_limit("2MB", 0)];
        assert!(fixture.error().message().contains("given twice"));
        fixture.resources().hugepage_limits = vec![page_limit("2MB", u64::MAX)];
        assert_eq!(fixture.error().code(), Code::InvalidArgument);
    }
}
